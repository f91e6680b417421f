"""What setup.py needs to build the extension; not installed."""
