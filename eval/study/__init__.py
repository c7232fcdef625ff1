"""The paper's study: its TOML file, the graph of steps, the runner, the results. `eval.paper` is the command."""
