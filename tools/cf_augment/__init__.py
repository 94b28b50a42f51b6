"""data: write counterfactual twins of records: gender, names, religion, age, disability, nationality."""
