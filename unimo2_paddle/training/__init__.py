"""The training loop, optimiser, schedules, distribution and logs; it knows only the Task protocol."""
