"""What is measured of a model: classification, language modelling, and lm-eval's tasks."""
