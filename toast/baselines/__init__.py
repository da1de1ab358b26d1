"""What TOAST is compared with: prompts, parallel adapters, and ways to train parts of a model."""
