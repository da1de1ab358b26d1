"""Pictures of what a steered model looks at: over images and over text."""
