"""Remote control: how nodes are asked, and their commands for tasks and pools."""
