"""When: order, retries, names and the dashboard (Prefect)."""
