"""Complete, named, runnable configurations: a TOML file each, read by `memorizing.load_config`."""
