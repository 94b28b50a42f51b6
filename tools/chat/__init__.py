"""evaluate: talk to any artifact, in any of its languages, guarded or not."""
