"""Choose precisions by measurement: calibrate, measure layers, solve for a recipe, repair an export."""
