"""The recipe's sections that `training` owns, and how a recipe file becomes one.

`cluster.recipe.Recipe` extends `TrainingRecipe` by the sections of the packages above (`fanout`, `cluster`); a file that has
them reads here too, with those two left alone, so that ``python -m training RECIPE`` needs no Ray.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, field_validator, model_validator

from data_shards.errors import UserError
from data_shards.stores.places import parse_place
from training.augment import AugmentConfig
from training.config import Config, apply_overrides, build, one_of, operational
from training.corruption import Corruption
from training.engines import EngineConfig
from training.families import FAMILIES
from training.families.copier import CopierConfig
from training.families.cyclegan import CycleganConfig
from training.families.density import DensityConfig
from training.families.sequence import SequenceConfig
from training.families.vae import VaeConfig
from training.health import HealthConfig
from training.meta import RULES
from training.meta.config import MetaConfig
from training.methods.adam import AdamConfig
from training.methods.anchors import AnchorConfig
from training.methods.bsa import BsaConfig
from training.methods.bss import BssConfig
from training.methods.cdc import CdcConfig
from training.methods.converter import ConverterConfig
from training.methods.distill import DistillConfig
from training.methods.ewc import EwcConfig
from training.methods.freezeg import FreezegConfig
from training.methods.fsgan import FsganConfig
from training.methods.l2sp import L2spConfig
from training.methods.lora import LoraConfig
from training.methods.minegan import MineganConfig
from training.methods.newclass import NewclassConfig
from training.methods.projected import ProjectedConfig
from training.methods.rssa import RssaConfig
from training.models.config import DiscriminatorConfig, GeneratorConfig
from training.objectives import OBJECTIVES, ObjectiveConfig
from training.objectives.packing import check_packing
from training.optimizers import OptimizerConfig
from training.schedule import Schedule, check_schedule, last_value
from training.wandb_log import WandbConfig

HIGHER_SECTIONS = ("fanout", "cluster")
SCHEMA_VERSION = 1
RECIPES_FOLDER = Path(__file__).resolve().parent.parent / "recipes"


class DataConfig(Config):
    source: str = Field(description="set of images to pretrain on: a folder below `root` or a path")
    root: str = operational("data", "folder or URL that holds the fetched and packed sets")
    translate_to: str | None = Field(None, description="set of domain B, for families that translate between two sets "
                                                       "(cyclegan); the source is domain A")
    mix: dict[str, float] = Field({}, description="further sets to pretrain on, and the weight of each where the source's is 1")
    class_weights: Literal["natural", "balanced"] | dict[str, float] = Field(
        "natural", description="how often each class of the source is drawn: as often as it occurs, all alike, or by name, and "
                               "then classes that are not named not at all")
    corruption: Corruption | None = Field(None, description="a share of the source's images that is spoilt on purpose, to see "
                                                            "what a gain owes to clean ones; the feature net sees clean ones")
    held_back: int = Field(256, ge=0, description="images of a source without a reference split that pretraining leaves out, "
                                                  "at most 1 in 20 of it, to watch the discriminator's overfitting on")
    streams: int = Field(24, ge=1, description="canonical streams C of the data order; world sizes must divide it")
    window: int = Field(1024, ge=1, description="samples in each stream's shuffle window")
    workers: int = operational(0, "decoding processes per rank; 0 decodes in the training process", ge=0)

    @field_validator("source", "root", "translate_to")
    @classmethod
    def _address(cls, value: str | None) -> str | None:
        return value if value is None else check_address(value)

    @field_validator("mix", "class_weights")
    @classmethod
    def _weights(cls, value: object) -> object:
        for name, weight in value.items() if isinstance(value, dict) else ():
            if not 0 < weight < float("inf"):
                raise ValueError(f"the weight {weight} of {name} must be a number over 0; leave out what is not to be read")
        if isinstance(value, dict):
            for name in value:
                check_address(name)
        return value


class TrainingConfig(Config):
    family: str = Field("gan", description=f"family of generative models: {', '.join(FAMILIES)}")
    generator: GeneratorConfig = GeneratorConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    vae: VaeConfig = VaeConfig()
    cyclegan: CycleganConfig = CycleganConfig()
    density: DensityConfig = DensityConfig()
    copier: CopierConfig = CopierConfig()
    sequence: SequenceConfig = SequenceConfig()
    augmentation: AugmentConfig = AugmentConfig()
    engine: EngineConfig = EngineConfig()
    images: int = Field(ge=1, description="real images seen over the whole pretraining")
    batch: int = Field(64, ge=1, description="images per step over all workers")
    ema_halflife_images: Schedule = Field(5000.0, description="half-life of the generator's moving average, in images")
    precision: Literal["auto", "fp32", "bf16", "bf16_weights", "fp16"] = Field(
        "auto", description="bf16 and fp16 autocast over fp32 weights, auto to bf16 where the processor computes it itself; "
                            "bf16_weights: the networks hold bf16 and DeepSpeed's optimizer, sharded, the fp32 masters")
    threads: int = Field(1, ge=1, description="CPU threads of each worker and trial")
    rescues: int = Field(3, ge=0, description="times that the learning rates are halved because steps were left out whose "
                                              "gradients were not finite; then training ends")
    report_every_images: int = operational(4096, "images between two lines of the metrics log", ge=1)
    snapshot_every_images: int = operational(32768, "images between two checkpoints", ge=1)
    keep_checkpoints: int = operational(2, "newest checkpoints kept", ge=2)
    keep_best: str = operational("", "metric of the log whose best checkpoint is kept beside the newest; empty for none")
    keep_best_is: Literal["smallest", "largest"] = operational("smallest", "which value of keep_best is the best")
    health: HealthConfig = HealthConfig()

    _schedule = field_validator("ema_halflife_images")(check_schedule)
    _known_family = field_validator("family")(one_of(lambda: FAMILIES, "family"))

    @model_validator(mode="after")
    def _engine_fits(self) -> TrainingConfig:
        engine, names = self.engine, FAMILIES[self.family].names
        named = {"zero": engine.zero if isinstance(engine.zero, dict) else {}, "compile": engine.compile}
        for key, networks in named.items():
            for name in networks:
                if name not in names:
                    raise ValueError(f"engine.{key} names {name!r}, but the networks are {' and '.join(names)}")
        penalised = "discriminator" in names and self.objective.penalised
        if "discriminator" in engine.compile and penalised:
            raise ValueError("engine.compile cannot have the discriminator while it has gradient penalties, since a compiled "
                             "network has no double backward; compile the generator only")
        for name in engine.compile:
            if engine.stage(name) == 3:
                raise ValueError(f"engine.compile cannot have the {name} at ZeRO 3, which gathers weights between its layers; "
                                 "use zero 2")
        if engine.checkpoint_activations and engine.stage("discriminator") == 3 and penalised:
            raise ValueError("engine.checkpoint_activations does not go with penalties at ZeRO 3, whose finite differences "
                             "hold rectifiers in the forward pass only; use zero {generator: 3, discriminator: 2}")
        if engine.stage("discriminator") == 3 and penalised and self.discriminator.minibatch_std:
            raise ValueError("discriminator.minibatch_std does not go with penalties at ZeRO 3, whose finite differences need "
                             "a logit that depends on one image; use zero {generator: 3, discriminator: 2}")
        if engine.checkpoint_activations and self.discriminator.spectral_norm:
            raise ValueError("engine.checkpoint_activations does not go with discriminator.spectral_norm, whose weights change "
                             "with each forward pass; leave one of the two")
        if self.precision == "bf16_weights":
            if engine.kind == "torch" or min(engine.stage(name) for name in names) < 2:
                raise ValueError("precision bf16_weights needs engine.kind auto or deepspeed and zero 2 or 3, which keep fp32 "
                                 "masters of their share; or use bf16")
            if engine.stage("discriminator") == 3 and penalised:
                raise ValueError("precision bf16_weights does not go with penalties at ZeRO 3, whose finite differences need "
                                 "fp32 weights; use precision bf16")
        if self.precision == "fp16" and (engine.kind == "deepspeed" or engine.offload_optimizer or engine.offload_parameters):
            raise ValueError("precision fp16 needs engine.kind auto or torch and no offload, since DeepSpeed scales the loss "
                             "for fp16 weights only; or use bf16")
        return self

    def optimizers(self) -> dict[str, OptimizerConfig]:
        """Of each network."""
        return {name: getattr(self, name) for name in FAMILIES[self.family].names}

    def weights(self, *, warm: bool = False) -> dict[str, Schedule]:
        """Of the losses' terms, by what the family's phases call them.

        Args:
            warm: for trials and tasks, whose count of images begins at 0 again: the divergence's weight after its warm-up.
        """
        kl = self.sequence.kl_weight if self.family == "sequence" else self.vae.kl_weight
        return {**self.objective.penalties(), "kl": last_value(kl) if warm else kl, "adversarial": self.vae.adversarial_weight}

    def on_one_process(self) -> TrainingConfig:
        """As trials and tasks train: by the plain engine."""
        return self.model_copy(update={"engine": EngineConfig(kind="torch")})

    @property
    def exact_penalties(self) -> bool:
        """Whether gradient penalties are by double backward, which ZeRO 3 cannot."""
        return self.engine.stage("discriminator") < 3

    @model_validator(mode="after")
    def _known_model(self) -> TrainingConfig:
        models = FAMILIES[self.family].models
        if models and self.generator.model not in models:
            raise ValueError(f"there is no such model; known: {', '.join(models)} (generator.model, family {self.family})")
        return self

    @model_validator(mode="after")
    def _family_reads_it(self) -> TrainingConfig:
        """What would silently do nothing is refused."""
        if (self.vae.samples > 1 or self.vae.bound != "elbo") and self.family in ("autoencoder", "vaegan"):
            raise ValueError(f"vae.bound and vae.samples are of the family vae only; leave them out for {self.family}")
        if self.vae.compare == "features" and self.family == "vaegan" and self.objective.pack > 1:
            raise ValueError("vae.compare = features takes D's features of single images, and objective.pack makes packs of "
                             "them; set pack to 1, or compare to pixels")
        if self.objective.pack > 1 and "discriminator" not in FAMILIES[self.family].names:
            raise ValueError(f"objective.pack makes packs for a discriminator, which the family {self.family} has none of; "
                             "leave it out")
        check_judged("training.augmentation", self.augmentation, self.family)
        if self.generator.miner_layers and self.family != "gan":
            raise ValueError("generator.miner_layers, which the method minegan sets, puts a miner before a GAN's generator, "
                             f"and the family is {self.family}; set it to 0, or leave minegan out of fanout.methods")
        return self

    @model_validator(mode="after")
    def _family_fits(self) -> TrainingConfig:
        FAMILIES[self.family].refuse(self)
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> TrainingConfig:
        check_packing("training.batch", self.batch, self.engine.accumulation, self.objective.pack)
        check_groups("training.batch", self.batch, self.engine.accumulation, self)
        check_adaptive("training.augmentation", self.augmentation, self.objective)
        return self


class AdaptationConfig(Config):
    shots: int = Field(10, ge=1, description="support images of a target domain")
    batch: int = Field(16, ge=1, description="images per step")
    images: int = Field(1600, ge=1, description="real images seen by one trial, repeats of the support set counted")
    lr: Schedule = Field(2e-4, description="learning rate of both networks")
    betas: tuple[float, float] = Field((0.0, 0.99), description="decay rates of Adam's moments")
    optimizers: dict[str, OptimizerConfig] = Field(
        {}, description="a whole optimizer section, by network, in the place of lr and betas")
    r1: Schedule = Field(1.0, description="weight of R1")
    r2: Schedule = Field(1.0, description="weight of R2")
    augmentation: AugmentConfig = AugmentConfig()
    conditional: bool = Field(False, description="tell the networks the classes of the target set, which begin as the source's "
                                                 "of the same name, or at the mean of the source's; pictures are of all alike")
    frozen: tuple[str, ...] = Field((), description="weights that stay as the start has them, in every method that has a "
                                    "start, by patterns over <network>.<weight>: [generator.blocks.0.*, '*.bias']")
    frozen_blocks: int = Field(2, ge=0, description="FreezeD: blocks of D, from the image side, that stay fixed")
    freezeg: FreezegConfig = FreezegConfig()
    l2sp: L2spConfig = L2spConfig()
    ewc: EwcConfig = EwcConfig()
    bss: BssConfig = BssConfig()
    distill: DistillConfig = DistillConfig()
    projected: ProjectedConfig = ProjectedConfig()
    ema_halflife_images: float = Field(160.0, gt=0, description="half-life of the generator's moving average, in images")
    adam: AdamConfig = AdamConfig()
    anchors: AnchorConfig = AnchorConfig()
    bsa: BsaConfig = BsaConfig()
    cdc: CdcConfig = CdcConfig()
    converter: ConverterConfig = ConverterConfig()
    fsgan: FsganConfig = FsganConfig()
    lora: LoraConfig = LoraConfig()
    minegan: MineganConfig = MineganConfig()
    newclass: NewclassConfig = NewclassConfig()
    rssa: RssaConfig = RssaConfig()

    _schedules = field_validator("lr", "r1", "r2")(check_schedule)


class EvaluationConfig(Config):
    net: str = Field("encoder", description="feature net of all scores: encoder (trained on the source labels), inception, "
                                            "efficientnet-lite0, or the path of a .safetensors, .pt or .onnx net")
    encoder_source: str | None = Field(None, description="set of the source's shape whose labels the encoder learns from; the "
                                                         "source when null, which then needs labels")
    samples: int = Field(500, ge=8, description="generated images per score")
    encoder_images: int = Field(120_000, ge=1, description="images seen by the in-domain encoder's training")
    encoder_threads: int = operational(2, "CPU threads of the in-domain encoder's training; sums differ in the last bits", ge=1)
    during_pretraining: int = operational(0, "images between two scorings of a checkpoint while pretraining goes on; 0 does "
                                             "none", ge=0)
    during_scores: tuple[str, ...] = operational(("kid", "prdc", "collapse"), "the scores taken then; docs/SCORES.md has them")
    against: str | None = operational(None, "set that the checkpoints are scored against; the source when null")


class TrainingRecipe(Config):
    """What ``python -m training`` reads."""

    name: str = operational("", "name of the run; the file's name when empty")
    seed: int = Field(0, ge=0, description="seed of every random draw")
    data: DataConfig
    training: TrainingConfig
    meta: MetaConfig = MetaConfig()
    adaptation: AdaptationConfig = AdaptationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    wandb: WandbConfig = WandbConfig()

    @model_validator(mode="after")
    def _sizes(self) -> TrainingRecipe:
        if self.adaptation.conditional and self.training.objective.pack > 1:
            raise UserError(f"adaptation.conditional and training.objective.pack = {self.training.objective.pack} exclude each "
                            "other: a pack would have several classes, and D's projection takes one; use one of the two.")
        if self.adaptation.batch > self.adaptation.images:
            raise UserError(f"adaptation.images = {self.adaptation.images} is less than one batch of "
                            f"{self.adaptation.batch}; raise it.")
        check_packing("adaptation.batch", self.adaptation.batch, 1, self.training.objective.pack)
        check_groups("adaptation.batch", self.adaptation.batch, 1, self.training)
        for meta in self.meta.each().values():
            for key in ("inner_batch", "queries") if RULES[meta.rule].queries else ("inner_batch",):
                check_packing(f"meta.{key}", getattr(meta, key), 1, self.training.objective.pack)
                check_groups(f"meta.{key}", getattr(meta, key), 1, self.training)
        check_adaptive("adaptation.augmentation", self.adaptation.augmentation, self.training.objective)
        check_judged("adaptation.augmentation", self.adaptation.augmentation, self.training.family)
        names = {name for family in FAMILIES.values() for name in family.names}  # a method may be of another family
        for name in self.adaptation.optimizers.keys() - names:
            raise UserError(f"adaptation.optimizers names {name!r}, but networks are called {', '.join(sorted(names))}.")
        return self

    @model_validator(mode="after")
    def _corruption_is_seen(self) -> TrainingRecipe:
        wrong = self.data.corruption and self.data.corruption.kind == "mislabelled"
        if wrong and self.training.generator.classes < 2:
            raise UserError("data.corruption.kind = mislabelled gives source images wrong classes, which networks that are "
                            "told none (training.generator.classes = 0) do not see; tell them, or choose another kind.")
        return self

    @model_validator(mode="after")
    def _two_sets_or_one(self) -> TrainingRecipe:
        family, translates = self.training.family, FAMILIES[self.training.family].translates
        if translates and not self.data.translate_to:
            raise UserError(f"training.family = {family} translates from data.source to data.translate_to, which is missing; "
                            "name a set there.")
        if self.data.translate_to and not translates:
            raise UserError(f"data.translate_to = {self.data.translate_to} is for families that translate, and training.family "
                            f"= {family} makes images from noise; leave it out, or use the family cyclegan.")
        if translates and (self.meta.steps or self.evaluation.during_pretraining):
            key = "meta.steps" if self.meta.steps else "evaluation.during_pretraining"
            raise UserError(f"{key} needs a generator that makes images from noise, and training.family = {family} translates "
                            "images; set it to 0.")
        return self

    def trial_optimizers(self) -> dict[str, OptimizerConfig]:
        """Of each network in a trial."""
        common = OptimizerConfig(lr=self.adaptation.lr, betas=self.adaptation.betas)
        return {name: self.adaptation.optimizers.get(name, common) for name in FAMILIES[self.training.family].names}


def check_groups(key: str, batch: int, parts: int, training: TrainingConfig) -> None:
    """Refuse a global ``batch``, each of whose ``parts`` (ranks x micro-batches) is not of whole groups of minibatch deviation.

    Raises:
        UserError: with the remedy.
    """
    group = training.discriminator.minibatch_std * training.objective.pack
    if group and batch % (group * parts):
        raise UserError(f"{key} = {batch} does not fall into groups of {group} images (training.discriminator.minibatch_std, "
                        f"times the pack) in each of its {parts} parts; use a multiple of {group * parts}.")


def check_adaptive(key: str, augmentation: AugmentConfig, objective: ObjectiveConfig) -> None:
    """Refuse ADA's controller with a loss whose D does not say which images it takes for real."""
    if augmentation.adaptive and OBJECTIVES[objective.loss].margin is None:
        raise UserError(f"{key}.p = adaptive needs D's decision on real images, which {objective.loss} has none of; give p as "
                        "a number or a schedule, or take another loss.")


def check_judged(key: str, augmentation: AugmentConfig, family: str) -> None:
    """Refuse augmentation of what D sees where there is no D."""
    if augmentation.kind and "discriminator" not in FAMILIES[family].names:
        raise UserError(f"{key}.kind = {augmentation.kind} changes what a discriminator sees, which the family {family} has "
                        "none of; leave it out.")


RecipeT = TypeVar("RecipeT", bound=TrainingRecipe)


def find_recipe(name: str) -> Path:
    """The file of a recipe given as a path or as a name in the recipes folder.

    Raises:
        UserError: when there is none, with the known names.
    """
    for path in (Path(name), RECIPES_FOLDER / name, RECIPES_FOLDER / f"{name}.yaml"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in RECIPES_FOLDER.glob("*.yaml")))
    raise UserError(f"there is no recipe {name!r}: give a path to a YAML file or one of {known}.")


def read_recipe(model: type[RecipeT], name: str, overrides: Mapping[str, Any] | None = None) -> RecipeT:
    """Read, override and validate a recipe; every stage and every trial gets its values through here."""
    path = find_recipe(name)
    try:
        tree = _StrictLoader(path.read_text(encoding="utf-8")).get_single_data()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as such.") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_place(error)} is not valid YAML: {_problem(error)}.") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a mapping of recipe keys; start from `graft recipes show smoke`.")
    tree = apply_overrides(tree, overrides or {})
    tree.setdefault("name", path.stem)
    return resolve(model, tree, where=str(path), overrides=overrides or ())


class _StrictLoader(yaml.SafeLoader):
    """As safe as yaml.SafeLoader, and a key that stands twice is an error: YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def check_address(value: str) -> str:
    """Returns a set's folder or URL; raises `UserError` for a command or a scheme that is not read."""
    if ":" in value and not Path(value).is_absolute():
        parse_place(value)
    return value


def _place(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}," if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    """What the parser found, without its excerpt of the file."""
    said = getattr(error, "problem", None) or str(error).partition("\n")[0]
    return " ".join(said.split()).rstrip(".")


def resolve(model: type[RecipeT], tree: Mapping[str, Any], *, where: str, overrides: Iterable[str] = ()) -> RecipeT:
    """Validate a recipe's tree, with the sections of packages above left out where ``model`` has none."""
    known = {key: value for key, value in tree.items() if key in model.model_fields or key not in HIGHER_SECTIONS}
    return build(model, known, where=where, overrides=overrides)


def per_worker_batch(batch: int, workers: int, streams: int, accumulation: int = 1) -> int:
    """Global batch / workers, which the micro-batches of ``accumulation`` must divide.

    Raises:
        UserError: when the batch or the canonical streams do not divide, with the nearest values that do.
    """
    if batch % workers:
        lower = batch - batch % workers
        raise UserError(f"training.batch = {batch} does not divide over {workers} workers; "
                        f"use {lower or workers} or {lower + workers}.")
    if streams % workers:
        divisors = [str(w) for w in range(1, streams + 1) if streams % w == 0]
        raise UserError(f"{workers} workers do not divide the {streams} canonical streams (data.streams); "
                        f"use one of {', '.join(divisors)}.")
    if batch // workers % accumulation:
        raise UserError(f"training.batch = {batch} over {workers} workers is {batch // workers} images each, which "
                        f"training.engine.accumulation = {accumulation} does not divide; lower it.")
    return batch // workers
