"""Scores, significance and the paper's study. How translations are made is unknown here; `eval.study` runs commands."""
