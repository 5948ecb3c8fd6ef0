"""All that there is to measure about one card, in a given time and best first."""
