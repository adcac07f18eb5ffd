"""What a rating is predicted from, and how."""
