"""The one trainer: stages differ by configuration."""
