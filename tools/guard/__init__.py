"""evaluate: guardrails learnt from one model's own failures: probe, train, check, run, measure."""
