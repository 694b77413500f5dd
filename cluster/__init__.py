"""Acts: the command line, Ray Train runs, the fan-out, submission, the report page. The only place for ray."""
