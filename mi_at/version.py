"""The version, on its own so that a record can name it without the package that stands above it."""

__version__ = "0.1.0"
