"""Jobs from data to report; import them as visionpeft.pipelines."""
