"""Pictures of what heads attend to and of what is computed of it, and the page that holds them."""
