"""Prediction of folders, evaluation against labels, metrics and figures."""
