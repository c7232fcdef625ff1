"""The paper's study: its TOML file, the graph of steps, the runner, and what it gathers. `eval.paper` is the command."""
