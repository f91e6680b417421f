"""Configuration of data, model, training and sampling: dataclasses, YAML files, command-line overrides."""
