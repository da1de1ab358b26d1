"""The two stages as a training system: a YAML file, a run folder, and Accelerate underneath."""
