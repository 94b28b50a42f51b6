"""evaluate: the card, the plots and the lineage of any artifact."""
