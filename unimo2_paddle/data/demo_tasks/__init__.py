"""Demo data of the finetuning tasks: one module per task, ``write(directory, demo_directory, seed)``, in the real file formats."""
