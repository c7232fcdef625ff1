"""Speed and memory as ratios within one run; not installed."""
