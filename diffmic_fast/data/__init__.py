"""Labelled images: tables, decoding, transforms and data sets."""
