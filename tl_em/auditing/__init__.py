"""The main job: from two models to a page of verdicts, composed from everything above."""
