"""The CPU benchmarks: our way against the peers', measured in one run."""
