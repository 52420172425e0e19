"""What users write against: functions, calls, durable work, local clusters."""
