"""The version of the package; packaging and `starflow --version` read it here."""

__version__ = "0.1.0"
