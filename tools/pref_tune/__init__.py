"""train: align a model with preferences by DPO and its kin, KTO or ORPO, or with a constitution."""
