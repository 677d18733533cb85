"""What each stage of a bake does, one module a stage; `pipeline` says in which order."""
