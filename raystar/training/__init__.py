"""The training step and everything around it within one trial; knows neither Ray nor MLflow."""
