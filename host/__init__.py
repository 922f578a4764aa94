"""Control plane: compile, load weights, build the model program, plan memory, launch, watch. Nothing here runs per token."""
