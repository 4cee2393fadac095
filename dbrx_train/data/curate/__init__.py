"""From raw text to a corpus that one can defend: cleaned, filtered, deduplicated, decontaminated."""
