"""What is measured, who takes part, what is right, and the clocks."""
