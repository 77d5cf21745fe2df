"""The mathematics in plain torch: moments, bases, planes, budgets, and the reference decode step."""
