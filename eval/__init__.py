"""Scores, significance and reports of translations (`eval.score.score`). It does not know how they were made."""
