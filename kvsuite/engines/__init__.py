"""Who answers: transformers in this process."""
