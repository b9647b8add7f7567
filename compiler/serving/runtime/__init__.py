"""What the generate model of a Triton repository runs. Copied into it as it is: nothing here imports this project."""
