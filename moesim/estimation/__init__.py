"""From scenario files to answers: loading, one estimate, many estimates."""
