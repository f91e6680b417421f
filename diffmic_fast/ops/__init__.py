"""The public operations: validation of arguments, backend dispatch, operator registration and gradients."""
