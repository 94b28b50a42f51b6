"""What two or more tuneutils tools need: commands, records, artifacts, models, losses, sampling."""
