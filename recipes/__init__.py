"""One room per experiment, written once against the shared names, for every model."""
