"""What a placement costs: predicted before the call, counted after it."""
