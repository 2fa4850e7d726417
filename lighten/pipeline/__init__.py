"""From a recipe to a published version: plan, build, measure, publish."""
