"""Small files that ship with the package: the bundled model and a sample clip."""
