"""MLflow: the only folder that imports it, beside `raystar.exported.serving`."""
