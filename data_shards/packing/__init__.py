"""How a source becomes shards: a pure plan, shards made independently of one another, and what is done with them all.

`plan` cuts, `shard` makes one, `place` is where they lie and what is finished there, `copies` finds duplicates, `workers`
runs over processes. `data_shards.pack` puts them together.
"""
