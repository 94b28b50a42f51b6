"""Bias of models: published test sets, embeddings, likelihoods, counterfactual twins, predictions."""
