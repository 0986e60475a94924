"""What is known of models: measured, and written to docs/models.md by ``make models``."""
